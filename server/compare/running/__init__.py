"""One comparison on its way: what is known, what is to do, what is kept."""
