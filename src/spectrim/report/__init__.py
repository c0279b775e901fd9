"""Records → tables and figures. Nothing here needs torch: a table can be built again where nothing can be run."""
