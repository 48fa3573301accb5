"""Code for one kind of network each; `registry` lists them."""
