"""Implement the algorithms of other papers. Each module says what its paper does and what differs here."""
