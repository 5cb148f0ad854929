"""Side-by-side measurements. Every script prints a table of ratios made in one run; see README.md."""
