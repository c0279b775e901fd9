"""Write a compressed model in formats that are read without spectrim."""
