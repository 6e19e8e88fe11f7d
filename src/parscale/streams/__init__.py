"""The method: what every file here computes is a box of the paper's figure."""
