"""Process groups, and work that one rank per node does for the others."""
