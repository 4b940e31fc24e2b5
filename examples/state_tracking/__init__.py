"""State tracking without tools by recurrent models, nonlinear and linear."""
