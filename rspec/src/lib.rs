//! rspecs and their arithmetic, names, rcaps: the vocabulary of Mandoline.
