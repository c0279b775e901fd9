"""The mathematics of factors, the layers made of them, and the plan that says which."""
