"""Policies at work: what they need to know, how they are asked, and how chunks of actions are carried out."""
