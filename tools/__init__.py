"""Tools of the repository: set-up, generation and checks. Nothing of the product imports them."""
