"""Mean and standard deviation of the images of ImageNet, by which torchvision normalises them."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # red, green and blue, on the scale [0, 1]
