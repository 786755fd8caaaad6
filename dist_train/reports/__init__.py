"""Tables, plots, HTML pages and comparisons of runs."""
