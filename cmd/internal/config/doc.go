// Package config turns flags, the configuration file and the environment into a checked Config.
//
// There is one table of options (Options). The flags, the words of the file, the help text and the option section of
// the manual are all generated from it, so that they always agree.
package config
