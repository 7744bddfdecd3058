from train_cc.io import threads as threads
