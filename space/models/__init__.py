"""The networks and what travels with them.

No imports here: a Space has only those files that it needs.
"""
