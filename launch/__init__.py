"""The commands that start processes: thin, so that everything they do can be imported and tested."""
