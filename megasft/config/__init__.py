"""The run file: its schema, its TOML, its values and the sizes of the parallel groups."""
