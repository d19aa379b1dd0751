"""The live page and the report. They read run directories only, and never write into one, the report's file apart."""
