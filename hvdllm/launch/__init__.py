"""Starts runs: a sweep of points (sweep.py), each by a launcher (base.py): here, under horovodrun, as a Slurm job."""
