"""What is measured against, in plain PyTorch and Transformers, without this package's operators.

(a) is the code as it comes; (b) is the best that a careful user would write without new kernels.
"""
