"""Files from the package registry that pip is set up for, without running anything of a package."""
