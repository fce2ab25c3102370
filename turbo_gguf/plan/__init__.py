"""What a model takes of memory, before it runs: from its header, or from the dry run of a build."""
