"""The mathematics of factors, factored layers and their forms, and the plan of what each layer keeps."""
