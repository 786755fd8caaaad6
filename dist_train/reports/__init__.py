"""What is made of finished runs: tables, plots, pages, comparisons."""
