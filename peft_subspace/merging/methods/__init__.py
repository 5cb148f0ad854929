"""Merge methods: `registry.py` says what one is, `catalogue.py` lists the built-in ones, the other files hold the kernels."""
