package config

import (
	"regexp"
	"strings"
	"unsafe"
)

// userinfo matches a user and a password before an @, with or without a scheme. The password is the group.
var userinfo = regexp.MustCompile(`(?:[A-Za-z0-9+.-]+://)?[^\s:@/=,]*:([^\s"']*)@`)

// Redact removes the passwords from URLs in s and keeps the user's name. It is for texts that quote the user's input.
func Redact(s string) string {
	return userinfo.ReplaceAllStringFunc(s, func(m string) string {
		if strings.HasSuffix(m, "[user[:password]@") { // the form of a URL, in a message
			return m
		}
		i := userinfo.FindStringSubmatchIndex(m)
		start := i[2]
		// the colon was that of the scheme: look for one after the user
		if rest, ok := strings.CutPrefix(m[start:i[3]], "//"); ok {
			colon := strings.IndexByte(rest, ':')
			if colon < 0 {
				return m
			}
			start += len("//") + colon + 1
		}
		return m[:start] + "***" + m[i[3]:]
	})
}

// secret returns start and end of the password in one argument, however malformed: from the first colon after the
// scheme to the last @.
func secret(arg string) (start, end int, ok bool) {
	end = strings.LastIndexByte(arg, '@')
	if end < 0 {
		return 0, 0, false
	}
	if i := strings.Index(arg[:end], "://"); i >= 0 {
		start = i + len("://")
	}
	colon := strings.IndexByte(arg[start:end], ':')
	if colon < 0 {
		return 0, 0, false
	}
	return start + colon + 1, end, true
}

// quote returns arg without its password.
func quote(arg string) string {
	if start, end, ok := secret(arg); ok {
		return arg[:start] + "***" + arg[end:]
	}
	return arg
}

// WipeTitle overwrites the passwords of URLs in args, which must be os.Args or a part of it: its strings are the
// process's own argument memory, which everybody can read in /proc/PID/cmdline. Call it after the needed parts were
// copied (Parse copies), and leave out the arguments of the program that will run.
func WipeTitle(args []string) {
	for _, a := range args {
		if start, end, ok := secret(a); ok {
			// The strings of os.Args are not constants: the runtime points them at the stack that the kernel filled.
			b := unsafe.Slice(unsafe.StringData(a), len(a))[start:end]
			for i := range b {
				b[i] = '*'
			}
		}
	}
}
