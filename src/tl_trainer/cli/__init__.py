"""The commands tl-train, tl-eval and tl-predict: argparse and one call each.

torch takes a second or two to import, so nothing here imports it before the arguments are known to be right.
"""
