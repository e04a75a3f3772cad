"""`fewstep plan`: a simulated fleet that answers sizing questions before anything is rented. Knows no torch and no Ray."""
