"""pararnn-torch's cells beside ours."""

# name -> its class, our order of gates among its W_x blocks, its names for the rows of our recurrent weight
PEERS = {
    "gru": ("ParaGRU", (0, 1, 2), ("a_z", "a_r", "a_n")),
    "lstm": ("ParaLSTM", (0, 2, 1), ("a_f", "a_o", "a_z", "c_f", "c_o")),
    "nlru": ("ParaNLRU", (0, 1), ("u",)),
    "slstm": ("ParaSLSTM", (0, 1, 2, 3), ("R",)),
}
