"""SFT and RRHF: the two stages of training of arXiv 2404.01342."""
