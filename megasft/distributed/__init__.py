"""Process groups, and work that one rank of a node does for the others."""
