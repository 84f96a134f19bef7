"""Searches: an Optuna study over runs that can be killed, shared and gone on with."""
