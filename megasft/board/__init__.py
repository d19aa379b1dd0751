"""The live page and the report, which read run directories only, and what the ranks of a run leave for them there."""
