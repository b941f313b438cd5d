"""Figures and widgets over records; never imports ranks or rollout."""
