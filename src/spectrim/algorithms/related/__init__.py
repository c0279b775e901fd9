"""Implement the rank selectors of other papers. Each module says what the paper does, and what is changed or left out
here.
"""
