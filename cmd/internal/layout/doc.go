// Package layout has no code. Its test holds the import table: which package may import which, and why.
package layout
