package dns

// Judge decides whether a question is answered. One that is not is answered REFUSED at once, and leaves this host in no
// form. name is in small letters and without the dot at its end, with an exclamation mark for each byte that no host name has
// (above all a dot inside a label, which would make one label look like two); it is empty for the root and for a message
// without a question. query is false for every operation but QUERY (UPDATE, NOTIFY). It is called on the goroutine that
// hands in the question, once for each that is well formed.
type Judge func(name string, query bool) bool

// allows asks j about the question of msg. A nil Judge allows all.
func (j Judge) allows(msg []byte, q *question) bool {
	if j == nil {
		return true
	}
	return j(questionName(msg, q), q.isQuery())
}

// questionName is the name that is asked for, as Judge documents it.
func questionName(msg []byte, q *question) string {
	if q.end == 0 {
		return ""
	}
	var buf [maxName]byte
	name, _, _ := appendAny(buf[:0], msg, headerLen)
	return string(name)
}
