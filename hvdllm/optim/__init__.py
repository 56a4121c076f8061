"""What a summed gradient does to the weights: update.py around one file per optimizer; schedule.py the rate."""
