"""Tables and figures built from records. This package does not import torch, so it also works where no run can."""
