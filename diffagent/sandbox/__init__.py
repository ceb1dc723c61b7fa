"""The sandbox: a small embedded world of drawn pictures, with tiny models trained on it.

Nothing here says anything about natural pictures, real models or real users. It exists so that
the whole system runs on two cores with nothing downloaded.
"""
