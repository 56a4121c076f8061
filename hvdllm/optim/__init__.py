"""What a summed gradient does to the weights: update.py, one file for each optimizer, and schedule.py for the rate."""
