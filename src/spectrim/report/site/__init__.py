"""The report: a static site of every table, figure and run, which needs no server and no network."""
