{{/* Under `volatile-ttl` a full Redis drops answers, which live shorter, before sessions. */}}
{{- define "arbitrage.redisConfiguration" -}}
{{- $redis := .Values.redis.bundled -}}
bind * -::*
protected-mode no
dir /data
maxmemory {{ int64 $redis.maxMemoryMib }}mb
maxmemory-policy volatile-ttl
{{- if $redis.persistence.enabled }}
appendonly yes
appendfsync everysec
{{- end }}
save ""
{{- end -}}
