"""CIFAR-10 on disk: the download, the built-in sample, the fast loader."""
