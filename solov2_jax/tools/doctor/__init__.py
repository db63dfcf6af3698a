"""Is this data set fit for training?"""
