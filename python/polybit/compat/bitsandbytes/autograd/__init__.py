"""The products and the state of an 8-bit layer."""
