"""Renders for others: a farm of workers (``flexkern.serve.fleet``), and what else carries jobs to them."""
