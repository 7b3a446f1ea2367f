"""The local web app: browse a run, name its concepts, look at its pairs, and try texts on its PM."""
