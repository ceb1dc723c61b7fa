"""The sandbox: a small embedded world of drawn pictures, with tiny models trained on it.

It lets the whole system run on two cores with nothing downloaded. Its numbers do not transfer to
natural pictures, real models or real users.
"""
