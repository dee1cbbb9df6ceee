"""CIFAR-10 on disk and in memory: images, download, built-in sample, fast loader."""
