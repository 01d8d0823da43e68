"""What the decode kernels for Hopper share: products, scores, copies of rows, combination."""
