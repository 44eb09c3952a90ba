"""One plain PyTorch function per op: the law every kernel is tested against."""
